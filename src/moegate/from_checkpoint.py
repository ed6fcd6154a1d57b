"""The constructors of `Gate` that read a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from moegate.spec import RouterSpec

if TYPE_CHECKING:
    from typing_extensions import Self


class FromCheckpoint:
    """Constructors for a class whose own constructor accepts a spec, tensors by role and the options of a gate."""

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        layer: int,
        *,
        spec: RouterSpec | Callable[[RouterSpec], RouterSpec] | None = None,
        tensors: Mapping[str, str] | None = None,
        device: torch.device | str = "cpu",
        frozen: bool = True,
        backend: str | None = None,
        policy: str = "measured",
    ) -> Self:
        """The gate of a layer of a local Hugging Face checkpoint.

        Reads the config and only this gate's tensors, through the index if the checkpoint is sharded. A float8 weight
        is multiplied by its scale (one number, one a row or one a block) in float32. The result is rounded to the
        model's dtype (bfloat16 if the config states none), unless the spec pins float32.

        Args:
            path: The folder with `config.json` and the safetensors files, or one of these files.
            layer: The number of the layer, as in the checkpoint's names.
            spec: What the router computes, in place of what the config says: a `RouterSpec`, with which no config is
                needed, or a function that changes the config's spec, such as
                `lambda found: dataclasses.replace(found, logits_dtype="float32")`.
            tensors: Names of tensors whose names the catalog does not know, by role: `weight`, `bias`,
                `e_score_correction_bias`, `input_scale`, `per_expert_scale`, `global_scale`, `tid2eid`. A full name,
                in which {layer} stands for the layer, or the part of the name behind "layers.3.".
            device: The device of the gate's tensors.
            frozen: See the class. True by default, since nothing else holds the tensors that are read here.
            backend: See the class.
            policy: See the class.

        Returns:
            The gate, on `device`.

        Raises:
            TypeError: A layer that is no int, a spec that is none, names that are no str.
            ValueError: A missing, broken or unknown config; a missing, corrupt or truncated file, or one outside the
                folder; a layer without a router (the message names those that have one); a gate in a quantised format
                other than float8, or with an adapter; a tensor that is missing or there twice, or has another shape
                than the spec says; a bias in the layer that the spec does not have; an unknown backend or policy, or a
                backend that cannot run there.
        """
        (gate,) = cls.all_from_checkpoint(
            path, (layer,), spec=spec, tensors=tensors, device=device, frozen=frozen, backend=backend, policy=policy
        ).values()
        return gate

    @classmethod
    def all_from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        layers: Iterable[int] | None = None,
        *,
        spec: RouterSpec | Callable[[RouterSpec], RouterSpec] | None = None,
        tensors: Mapping[str, str] | None = None,
        device: torch.device | str = "cpu",
        frozen: bool = True,
        backend: str | None = None,
        policy: str = "measured",
    ) -> dict[int, Self]:
        """The gates of many layers of a local checkpoint, in one pass over its names; each file is opened once.

        Args:
            path: As in `from_checkpoint`.
            layers: The layers. None: all layers with a router, except layers past the config's number of layers, which
                are for multi-token prediction.
            spec: For all layers; a function is called once for each layer.
            tensors: For all layers; a full name must have {layer} in it.
            device: As in `from_checkpoint`.
            frozen: As in `from_checkpoint`.
            backend: As in `from_checkpoint`.
            policy: As in `from_checkpoint`.

        Returns:
            The gates by the number of their layer, in ascending order.

        Raises:
            TypeError: As in `from_checkpoint`.
            ValueError: As in `from_checkpoint`; or no layer has a router.
        """
        from moegate.catalog.checkpoint import Checkpoint

        make: Callable[..., Self] = cls
        gates = {}
        for number, (found, read) in Checkpoint(path, spec, tensors).read_all(layers):
            there: dict[str, Any] = {name: tensor.to(device) for name, tensor in read.items()}
            gates[number] = make(found, **there, frozen=frozen, backend=backend, policy=policy)
        return gates
