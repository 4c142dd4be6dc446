"""The training and evaluation steps: pure functions of state and batch."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from metaformer_jax.data.device import DeviceTransform, check_groups
from metaformer_jax.data.mixing import Mixed
from metaformer_jax.messages import first_few
from metaformer_jax.models import Frozen, ImageKeys, MetaFormer, compiler_options
from metaformer_jax.models.lowering.platform import compiled_for
from metaformer_jax.models.stages import other_state
from metaformer_jax.training import sharding

Tree = dict[str, Any]
Batch = dict[str, Array]
Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Average:
    """An exponential moving average of the parameters.

    Attributes:
        decay: the weight of the previous average at each update.
        warmup: limits this weight at first, to (1 + t) / (10 + t) at update t.
    """

    decay: float
    warmup: bool = False

    def __call__(self, average: Tree, params: Tree, step: Int[Array, ""]) -> Tree:
        """The average after the update number `step`, counted from 0."""
        # The weight of the new parameters. In float32, 1 - 0.9999 would not be 1e-4.
        share = jnp.float32(1 - self.decay)
        if self.warmup:
            share = jnp.maximum(share, 9.0 / (10.0 + step))
        return jax.tree.map(lambda old, new: old + share * (new - old), average, params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, and the frozen variables.

    Attributes:
        step: number of updates, including skipped ones.
        params: trained parameters, as nested dicts by the model's attributes.
        frozen: variables that are never trained (`Frozen`), in the same form.
        opt_state: the optimiser's moments and counts.
        ema: the moving average of `params`, or {}.
        num_skipped: number of updates skipped in a row, up to and including the last.
    """

    step: Int[Array, ""]
    params: Tree
    frozen: Tree
    opt_state: Any
    ema: Tree
    num_skipped: Int[Array, ""]


class Engine:
    """A model, its optimiser and a mesh: initial state, training step and evaluation step.

    Each device gathers whole parameters and computes the gradient of its part of the batch, one
    micro-batch after the other; the gradients are then summed over the devices, once. If a loss or
    gradient is not finite, the update changes nothing but `num_skipped` and the number of the step,
    which the learning rate follows.

    Args:
        build: makes the model from its `nnx.Rngs`; it is only traced.
        optimizer: turns gradients into updates.
        mesh: the devices, see `sharding.create_mesh`.
        transform: from the batch's uint8 images and labels to images and targets.
        seed: of the initial parameters, and of mixing, erasing and masks in each step.
        num_micro_batches: in which each device processes its share of a batch.
        average: the moving average of the parameters; None for none.
        head_only: whether only the head is trained.

    Raises:
        ValueError: the model has arrays that are neither `nnx.Param` nor `Frozen`.
    """

    def __init__(
        self,
        build: Callable[[nnx.Rngs], MetaFormer],
        optimizer: optax.GradientTransformation,
        *,
        mesh: Mesh,
        transform: DeviceTransform,
        seed: int = 0,
        num_micro_batches: int = 1,
        average: Average | None = None,
        head_only: bool = False,
    ):
        self.mesh = mesh
        self.model = nnx.eval_shape(lambda: build(nnx.Rngs(seed)))
        self._graphdef = nnx.graphdef(self.model)
        self._rest = nnx.state(self.model, nnx.Not(nnx.Any(nnx.Param, Frozen)))
        if others := first_few([*other_state(self.model)]):
            raise ValueError(
                "All arrays of a model that is trained must be nnx.Param or Frozen, got others at "
                f"{', '.join(others)}. A step would lose what becomes of them: take layers "
                "without, such as norms without running means, and make constants Frozen."
            )
        self._build = build
        self._optimizer = optimizer
        self._transform = transform
        self._seed = seed
        self._num_micro_batches = num_micro_batches
        self._average = average
        self._head_only = head_only
        abstract = jax.eval_shape(self._state_of, *_variables(self.model))
        self._specs = sharding.parameter_specs(abstract, mesh)
        self.state_shardings: TrainState = sharding.placed(self._specs, mesh)
        self.abstract_state: TrainState = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            abstract,
            self.state_shardings,
        )
        # They run once: on a CPU, optimising them takes longer than running them ever could.
        once = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        self.initial_state = jax.jit(
            self._initial_state, out_shardings=self.state_shardings, compiler_options=once
        )
        self.training_inputs = jax.jit(self._training_inputs, compiler_options=once)
        self._platform = mesh.devices.flat[0].platform
        options = compiler_options(self._platform)
        self.train_step = jax.jit(
            self._train_step,
            donate_argnums=0,
            out_shardings=(self.state_shardings, None),
            compiler_options=options,
        )
        self.eval_step = jax.jit(
            self._eval_step, out_shardings=sharding.replicated(mesh), compiler_options=options
        )

    def _initial_state(self) -> TrainState:
        return self._state_of(*_variables(self._build(nnx.Rngs(self._seed))))

    def _state_of(self, params: Tree, frozen: Tree) -> TrainState:
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            frozen=frozen,
            opt_state=self._optimizer.init(self._trained(params)),
            ema=jax.tree.map(jnp.copy, params) if self._average else {},
            num_skipped=jnp.zeros((), jnp.int32),
        )

    def with_weights(self, state: TrainState, variables: Mapping[Path, np.ndarray]) -> TrainState:
        """The state with new values of parameters (and of their average) and frozen variables.

        Args:
            state: provides everything that `variables` leaves out.
            variables: values by path, see `weights.pretrained.fitted_variables`.
        """

        def replaced(tree: Tree, places: Tree) -> Tree:
            flat, flat_places = map(nnx.traversals.flatten_mapping, (tree, places))
            new = {
                path: jax.make_array_from_callback(
                    variables[path].shape, flat_places[path], variables[path].__getitem__
                )
                for path in flat.keys() & variables.keys()
            }
            return nnx.traversals.unflatten_mapping({**flat, **new})

        places = self.state_shardings
        return dataclasses.replace(
            state,
            params=replaced(state.params, places.params),
            frozen=replaced(state.frozen, places.frozen),
            ema=replaced(state.ema, places.ema) if state.ema else {},
        )

    def averaged(self, state: TrainState) -> TrainState:
        """The state with the moving average as its parameters."""
        return dataclasses.replace(state, params=state.ema)

    def _trained(self, params: Tree) -> Tree:
        return {"head": params["head"]} if self._head_only else params

    def _logits(
        self, params: Tree, frozen: Tree, images: Array, keys: ImageKeys | None
    ) -> Float[Array, "b classes"]:
        model = nnx.merge(self._graphdef, params, frozen, self._rest)
        if keys is None:
            model.eval()
        else:
            model.train()
        with compiled_for(self._platform):
            return model(images, rngs=keys)

    def _keys(self, step: Int[Array, ""], batch_size: int) -> tuple[Array, Array, Array]:
        """The random keys of a step: of mixing groups, and of each image's erasing and masks."""
        # Whatever JAX's default is: RBG's keys do not draw apart under `jax.vmap`.
        seed = jax.random.key(self._seed, impl="threefry2x32")
        transform_key, dropout_key = jax.random.split(jax.random.fold_in(seed, step))
        check_groups(batch_size, self.mesh.size, self._transform.group_size)
        group_keys, image_keys = self._transform.keys(transform_key, batch_size)
        return group_keys, image_keys, jax.random.split(dropout_key, batch_size)

    def _training_inputs(self, batch: Batch, step: Int[Array, ""]) -> tuple[Array, Array]:
        """The images and targets that this step trains on, mixed, normalised and erased."""

        def inputs(images: Array, labels: Array, group_keys: Array, image_keys: Array) -> Any:
            return self._transform.training(
                self._transform.mix(images, labels, group_keys), image_keys
            )

        group_keys, image_keys, _ = self._keys(step, len(batch["image"]))
        over_devices = sharding.on_each_device(self.mesh, inputs)
        return over_devices(batch["image"], batch["label"], group_keys, image_keys)

    def _train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """One update. All randomness derives from the seed and the step number."""
        batch_size = len(batch["image"])

        def on_device(params: Tree, frozen: Tree, *part: Array) -> tuple[Tree, dict[str, Array]]:
            params = sharding.gather(params, self._specs.params)
            frozen = sharding.gather(frozen, self._specs.frozen)
            sums = self._local_gradients(params, frozen, *part)
            gradients, metrics = jax.tree.map(lambda total: total / batch_size, sums)
            gradients = sharding.add_up(gradients, self._trained(self._specs.params))
            return gradients, jax.lax.psum(metrics, sharding.AXES)

        over_batch, everywhere = sharding.BATCH, sharding.EVERYWHERE
        gradients, metrics = jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(self._specs.params, self._specs.frozen, *[over_batch] * 5),
            out_specs=(self._trained(self._specs.params), everywhere),
            check_vma=False,
        )(
            state.params,
            state.frozen,
            batch["image"],
            batch["label"],
            *self._keys(state.step, batch_size),
        )
        metrics["grad_norm"] = optax.tree.norm(gradients)
        is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        new_state = self._updated(state, gradients, is_finite)
        metrics["num_skipped"] = new_state.num_skipped
        return new_state, metrics

    def _updated(self, state: TrainState, gradients: Tree, is_finite: Array) -> TrainState:
        """The state after the update; if it is not finite, only the counts change."""
        trained = self._trained(state.params)
        updates, opt_state = self._optimizer.update(gradients, state.opt_state, trained)
        params = state.params | optax.apply_updates(trained, updates)
        ema = self._average(state.ema, params, state.step) if self._average else {}
        params, opt_state, ema = jax.tree.map(
            lambda new, old: jnp.where(is_finite, new, old),
            (params, opt_state, ema),
            (state.params, state.opt_state, state.ema),
        )
        return TrainState(
            step=state.step + 1,
            params=params,
            frozen=state.frozen,
            opt_state=_scheduled_for(opt_state, state.step + 1),
            ema=ema,
            num_skipped=jnp.where(is_finite, 0, state.num_skipped + 1),
        )

    def _local_gradients(
        self,
        params: Tree,
        frozen: Tree,
        images: Array,
        labels: Array,
        group_keys: Key[Array, " groups"],
        image_keys: Key[Array, " b"],
        dropout_keys: Key[Array, " b"],
    ) -> tuple[Tree, dict[str, Array]]:
        """Sums of gradients and metrics over the images of one device, without communication."""

        def loss_fn(trained: Tree, part: tuple[Mixed, Array, Array]) -> tuple[Array, Array]:
            mixed, image_keys, dropout_keys = part
            inputs, targets = self._transform.training(mixed, image_keys)
            logits = self._logits(params | trained, frozen, inputs, ImageKeys(dropout_keys))
            is_right = logits.argmax(-1) == targets.argmax(-1)
            return optax.softmax_cross_entropy(logits, targets).sum(), is_right.sum()

        def add_part(sums: Any, part: Any) -> tuple[Any, None]:
            (loss, num_right), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
                self._trained(params), part
            )
            metrics = {"loss": loss, "accuracy": num_right.astype(jnp.float32)}
            return jax.tree.map(jnp.add, sums, (gradients, metrics)), None

        # Mixing groups may span micro-batches, so all are mixed first: uint8 takes little memory.
        everything = (self._transform.mix(images, labels, group_keys), image_keys, dropout_keys)
        zero = jnp.zeros((), jnp.float32)
        sums: Any = (
            jax.tree.map(jnp.zeros_like, self._trained(params)),
            {"loss": zero, "accuracy": zero},
        )
        if self._num_micro_batches == 1:
            return add_part(sums, everything)[0]
        parts = jax.tree.map(
            lambda leaf: leaf.reshape(self._num_micro_batches, -1, *leaf.shape[1:]), everything
        )
        return jax.lax.scan(add_part, sums, parts)[0]

    def _eval_step(self, state: TrainState, batch: Batch) -> dict[str, Array]:
        """For each example: loss, prediction and its probability, and the rank of the label."""

        def on_device(params: Tree, frozen: Tree, images: Array, labels: Array) -> dict[str, Array]:
            params = sharding.gather(params, self._specs.params)
            frozen = sharding.gather(frozen, self._specs.frozen)
            logits = self._logits(params, frozen, self._transform.evaluation(images), None)
            prediction = logits.argmax(-1).astype(jnp.int32)
            of_label = jnp.take_along_axis(logits, labels[:, None], axis=-1)
            num_above = jnp.sum(~(logits < of_label), axis=-1, dtype=jnp.int32) - 1
            # Of equal logits the first is the prediction; NaN is never right.
            is_right = (prediction == labels) & ~jnp.isnan(of_label[:, 0])
            return {
                "loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels),
                "prediction": prediction,
                "probability": jax.nn.softmax(logits).max(-1),
                "rank": jnp.where(is_right, 0, jnp.maximum(num_above, 1)),
                "label": labels,
            }

        results = jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(self._specs.params, self._specs.frozen, sharding.BATCH, sharding.BATCH),
            out_specs=sharding.BATCH,
            check_vma=False,
        )(state.params, state.frozen, batch["image"], batch["label"])
        return {**results, "mask": batch["mask"], "index": batch["index"]}


def _scheduled_for(opt_state: Any, step: Int[Array, ""]) -> Any:
    """The learning rate follows the steps, also those whose update was skipped."""

    def is_schedule(part: Any) -> bool:
        return isinstance(part, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda part: part._replace(count=step) if is_schedule(part) else part,
        opt_state,
        is_leaf=is_schedule,
    )


def _variables(model: MetaFormer) -> tuple[Tree, Tree]:
    """The parameters and the frozen variables of a model, as nested dicts."""
    params, frozen = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, Frozen))
    return params, frozen
