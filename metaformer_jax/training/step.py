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
from jaxtyping import Array, Float, Int

from metaformer_jax.data.device import DeviceTransform
from metaformer_jax.models import Frozen, MetaFormer
from metaformer_jax.training import sharding

Tree = dict[str, Any]
Batch = dict[str, Array]
Path = tuple[Any, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, and the frozen variables that go with it.

    Attributes:
        step: updates done.
        params: what is trained, as nested dicts by the model's attributes.
        frozen: what is drawn once and kept (`Frozen`), likewise.
        opt_state: the optimiser's moments and counts.
    """

    step: Int[Array, ""]
    params: Tree
    frozen: Tree
    opt_state: Any


class Engine:
    """A model, its optimiser and a mesh, ready to initialise, train and evaluate.

    Args:
        build: makes the model from its `nnx.Rngs`; only ever traced.
        optimizer: what turns gradients into updates.
        mesh: the devices, see `sharding.create_mesh`.
        transform: from the batch's uint8 images and labels to images and targets.
        seed: initial parameters, and the mixing and masks of each step.
    """

    def __init__(
        self,
        build: Callable[[nnx.Rngs], MetaFormer],
        optimizer: optax.GradientTransformation,
        *,
        mesh: Mesh,
        transform: DeviceTransform,
        seed: int = 0,
    ):
        self.mesh = mesh
        self.model = nnx.eval_shape(lambda: build(nnx.Rngs(seed)))
        self._graphdef = nnx.graphdef(self.model)
        self._rest = nnx.state(self.model, nnx.Not(nnx.Any(nnx.Param, Frozen)))
        self.build = build
        self._optimizer = optimizer
        self._transform = transform
        self._seed = seed
        abstract = jax.eval_shape(self._initial_state)
        self.state_shardings = dataclasses.replace(
            sharding.over_parameters(abstract, mesh), step=sharding.replicated(mesh)
        )
        self.abstract_state: TrainState = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            abstract,
            self.state_shardings,
        )
        # It runs once: on a CPU, optimising it takes longer than running it ever could.
        once = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        self.initial_state = jax.jit(
            self._initial_state, out_shardings=self.state_shardings, compiler_options=once
        )
        self.train_step = jax.jit(
            self._train_step, donate_argnums=0, out_shardings=(self.state_shardings, None)
        )
        self.training_inputs = jax.jit(self._training_inputs)
        self.eval_step = jax.jit(self._eval_step, out_shardings=sharding.replicated(mesh))

    def _initial_state(self) -> TrainState:
        model = self.build(nnx.Rngs(self._seed))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            frozen=nnx.to_pure_dict(nnx.state(model, Frozen)),
            opt_state=self._optimizer.init(params),
        )

    def with_weights(self, state: TrainState, variables: Mapping[Path, np.ndarray]) -> TrainState:
        """A state in which these parameters and frozen variables have other values.

        Args:
            state: keeps what `variables` leaves out.
            variables: values by path, as `weights.fitted_variables` gives them.
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

        return dataclasses.replace(
            state,
            params=replaced(state.params, self.state_shardings.params),
            frozen=replaced(state.frozen, self.state_shardings.frozen),
        )

    def _logits(
        self, params: Tree, frozen: Tree, images: Array, key: Array | None
    ) -> Float[Array, "b classes"]:
        model = nnx.merge(self._graphdef, params, frozen, self._rest)
        if key is None:
            model.eval()
            return model(images)
        model.train()
        return model(images, rngs=nnx.Rngs(dropout=key))

    def _keys(self, step: Int[Array, ""]) -> tuple[Array, Array]:
        """What a step's images and its masks derive from."""
        transform_key, dropout_key = jax.random.split(
            jax.random.fold_in(jax.random.key(self._seed), step)
        )
        return transform_key, dropout_key

    def _training_inputs(self, batch: Batch, step: Int[Array, ""]) -> tuple[Array, Array]:
        """The images and targets that this step trains on."""
        key, _ = self._keys(step)
        return self._transform.training(batch["image"], batch["label"], key=key, mesh=self.mesh)

    def _train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """One update. All randomness derives from the seed and the step's number."""
        images, targets = self._training_inputs(batch, state.step)
        _, dropout_key = self._keys(state.step)

        def loss_fn(params: Tree) -> tuple[Array, Array]:
            logits = self._logits(params, state.frozen, images, dropout_key)
            return optax.softmax_cross_entropy(logits, targets).mean(), logits

        (loss, logits), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = self._optimizer.update(gradients, state.opt_state, state.params)
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
        )
        metrics = {
            "loss": loss,
            "accuracy": jnp.mean(logits.argmax(-1) == targets.argmax(-1)),
            "grad_norm": optax.tree.norm(gradients),
        }
        return new_state, metrics

    def _eval_step(self, state: TrainState, batch: Batch) -> dict[str, Array]:
        """For each example its loss, prediction and that one's probability, and what came along."""
        images = self._transform.evaluation(batch["image"])
        logits = self._logits(state.params, state.frozen, images, None)
        probabilities = jax.nn.softmax(logits)
        return {
            "loss": optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]),
            "prediction": logits.argmax(-1).astype(jnp.int32),
            "probability": probabilities.max(-1),
            "label": batch["label"],
            "mask": batch["mask"],
            "index": batch["index"],
        }
