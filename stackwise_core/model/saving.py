"""A rack in a folder, and the tensors of a stack's files, which the artifacts of a flow share.

Safetensors and JSON, nothing that runs code when opened; see `stages.saved_rack` for what `rack.json` holds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from stackwise_core.config.schema import Mode, Precision
from stackwise_core.errors import ConfigError, Fault, SavedRackError
from stackwise_core.files import recover_folder, replace_folder, write_file
from stackwise_core.model.adapters import (
    adapter_names,
    adapter_spec,
    adapter_state,
    add_adapter,
    base_state,
    check_same_kind,
    load_adapter_state,
)
from stackwise_core.model.blocks import Stack
from stackwise_core.model.precision import STORAGE, base_linears, convert_storage, storage_of
from stackwise_core.model.stream import ChannelStatistics
from stackwise_core.stages.resolve import ModelShape
from stackwise_core.stages.saved_rack import RACK, SavedRack, SavedStack, Storage
from stackwise_core.stages.stages import StackSpec

STACK, HEAD, EMBEDDING, CHANNELS = (f"{part}.safetensors" for part in ("stack", "head", "embedding", "channels"))
CPU = torch.device("cpu")
_PIECE = 8 * 2**20
_PRECISIONS: dict[str, Precision] = {storage: precision for precision, storage in STORAGE.items()}


# ---------------------------------------------------------------- the tensors of files


def adapter_file(name: str) -> str:
    """Return the file name of an adapter."""
    return f"adapter-{name}.safetensors"


def stack_tensors(stack: Stack, *, base: bool = True, adapters: bool = True) -> dict[str, dict[str, Tensor]]:
    """Return the live tensors of a stack by file: its base, and each of its adapters."""
    files = {STACK: base_state(stack)} if base else {}
    return files | {adapter_file(name): adapter_state(stack, name) for name in adapter_names(stack) if adapters}


def channel_tensors(channels: Mapping[int, ChannelStatistics]) -> dict[str, Tensor]:
    """Return the statistics of the outputs of some stacks, by creation index, as named tensors."""
    return {f"stack-{stack}.{name}": t for stack, of in channels.items() for name, t in of._asdict().items()}


def channels_in(tensors: Mapping[str, Tensor]) -> dict[int, ChannelStatistics]:
    """Return the statistics that `channel_tensors` named, by creation index; raises ValueError if a tensor lacks."""
    try:
        return {
            int(name.removeprefix("stack-").removesuffix(".mean")): ChannelStatistics(
                tensor, tensors[name.replace(".mean", ".std")]
            )
            for name, tensor in tensors.items()
            if name.endswith(".mean")
        }
    except KeyError as missing:
        raise ValueError(f"has no {missing}") from None


def serialised(tensors: Mapping[str, Tensor]) -> bytes:
    """Return named tensors as the bytes of a safetensors file."""
    return save_safetensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def safetensors_pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file in pieces of a few MiB, so that no second copy of the tensors is held."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # which aligns each
    header, at = dict[str, Any](), 0
    for name in names:
        end = at + tensors[name].nbytes
        header[name] = {"dtype": _kind(tensors[name].dtype), "shape": [*tensors[name].shape], "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield from (data[start : start + _PIECE].data for start in range(0, len(data), _PIECE))


def _kind(dtype: torch.dtype) -> str:
    """Return the name of a type in safetensors; float8 is none that is written here."""
    named = {torch.bfloat16: "BF16", torch.bool: "BOOL", torch.uint8: "U8"}
    return named.get(dtype) or f"{'F' if dtype.is_floating_point else 'I'}{8 * dtype.itemsize}"


def deserialised(data: bytes) -> dict[str, Tensor]:
    """Return the named tensors of a safetensors file; raises ValueError if it is none."""
    try:
        return load_safetensors(data)
    except Exception as error:  # safetensors raises SafetensorError for bad headers, and others for bad shapes
        raise ValueError(f"is not a safetensors file ({error})") from None


def hold(module: nn.Module, tensors: dict[str, Tensor], device: torch.device = CPU) -> None:
    """Have a module without storage, made on the device `meta`, take over its tensors, one by one, on a device.

    Nothing is drawn, quantised or copied before; raises ValueError if a name, shape or dtype differs.
    """
    check_same_kind(module.state_dict(), tensors)
    for name in tensors:  # a copy lies where torch aligns it, which bits of products may depend on
        tensors[name] = tensors[name].to(device, copy=True)
    module.load_state_dict(tensors, assign=True)


def mapped(path: Path) -> dict[str, Tensor]:
    """Return the named tensors of a safetensors file, mapped into memory, privately; nothing may write to the file.

    Raises ValueError if it is none.
    """
    try:
        return load_file(path)
    except Exception as error:
        raise ValueError(f"is not a safetensors file ({error})") from None


def fill(load: Callable[[dict[str, Tensor]], object], tensors: dict[str, Tensor]) -> None:
    """Load tensors into a module; raises ValueError with one sentence if they do not fit it."""
    try:
        load(tensors)
    except (RuntimeError, ValueError) as error:
        told = str(error).splitlines()[-1].strip()
        raise ValueError(f"does not fit the model that it belongs to ({told})") from None


# ---------------------------------------------------------------- the folder of a rack


def write_whole(folder: str | Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write the named files of a rack, whole or not at all, in the place of an older one.

    Raises:
        SavedRackError: the folder holds something that is not a saved rack; it is left as it is.
    """
    folder = _checked_target(folder)
    fresh = folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        for name, data in files:
            (fresh / name).parent.mkdir(exist_ok=True, parents=True)
            write_file(fresh / name, data)
        replace_folder(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def folder_of(stack: int) -> str:
    """Return the folder of a stack inside that of its rack."""
    return f"stack-{stack}"


def described_stacks(
    stacks: Sequence[Stack], trained: Collection[int] | None, modes: Sequence[Mode] = ()
) -> tuple[SavedStack, ...]:
    """Describe stacks, given in data-flow order; None stands for all of them being trained.

    `modes` says how each was added, in creation order; where it does not, the order of the stacks tells.
    """
    order = [stack.creation_index for stack in stacks]
    if sorted(order) != list(range(len(order))):
        allowed = "each number from 0 on must be there once; a builder's stacks have them"
        raise ConfigError([Fault("creation_index", repr(order), allowed)])
    return tuple(
        SavedStack(
            index=stack.creation_index,
            n_blocks=len(stack.blocks),
            precision=stack.precision,
            adapters={name: adapter_spec(stack, name) for name in adapter_names(stack)},
            storage=cast("Storage", storage_of(next(iter(base_linears(stack).values())))),
            mode=mode,
            tail=above if mode == "insert" else 0,
            trained=trained is None or stack.creation_index in trained,
        )
        for stack in sorted(stacks, key=lambda stack: stack.creation_index)
        for mode, above in [_added(order, stack.creation_index, modes)]
    )


def _added(order: Sequence[int], stack: int, modes: Sequence[Mode]) -> tuple[Mode, int]:
    """Return how a stack was added, and how many of the stacks that were there are above it."""
    above = sum(other < stack for other in order[order.index(stack) :])
    if stack < len(modes):
        return modes[stack], above
    return ("append" if not above else "prepend" if above == stack else "insert"), above


def load_saved_stack(saved: SavedRack, spec: SavedStack) -> Stack:
    """Return a stack of a saved rack, with its adapters."""
    stack, folder = empty_stack(saved.shape, spec, _PRECISIONS[spec.storage]), folder_of(spec.index)
    fill_from(saved, f"{folder}/{STACK}", partial(hold, stack))
    for name, adapter in spec.adapters.items():
        add_adapter(stack, name, adapter.rank, adapter.alpha, seed=0)
        fill_from(saved, f"{folder}/{adapter_file(name)}", partial(load_adapter_state, stack, name))
    return stack


def load_saved_channels(saved: SavedRack) -> dict[int, ChannelStatistics]:
    """Return the statistics of the stacks' outputs, by creation index; none where the stream is not quantised."""
    found: dict[int, ChannelStatistics] = {}
    if CHANNELS in saved.files:
        fill_from(saved, CHANNELS, lambda tensors: found.update(channels_in(tensors)))
    return found


def empty_stack(shape: ModelShape, spec: StackSpec, stored: Precision) -> Stack:
    """Return a stack without adapters in the storage type of a precision, to be given to `hold`."""
    with torch.device("meta"):
        stack = Stack(shape, spec.n_blocks, spec.index, spec.precision)
    convert_storage(stack, stored)
    return stack


def tensors_of(saved: SavedRack, name: str) -> dict[str, Tensor]:
    """Return the tensors in a file of a saved rack; raises SavedRackError if it is damaged."""
    found: dict[str, Tensor] = {}
    fill_from(saved, name, found.update)
    return found


def fill_from(saved: SavedRack, name: str, load: Callable[[dict[str, Tensor]], object]) -> None:
    """Load a file of a saved rack into a module; raises SavedRackError if it is damaged or does not fit."""
    try:
        fill(load, deserialised(saved.read(name)))  # the bytes of the file are gone before a module is filled
    except ValueError as error:
        raise SavedRackError(saved.folder / name, str(error), "Save the rack again") from None


def _checked_target(folder: str | Path) -> Path:
    """Return a folder that may be replaced by a saved rack: absent, empty, or holding a saved rack and nothing else."""
    folder = Path(folder).expanduser().resolve()  # a link to a folder stays a link
    if not folder.exists():
        recover_folder(folder)
        return folder
    remedy = "Nothing was written: give another folder, or remove this one"
    if not folder.is_dir():
        raise SavedRackError(folder, "is a file", remedy)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if not present:
        return folder
    try:
        saved = SavedRack.at(folder)
    except SavedRackError as error:
        raise SavedRackError(folder, f"holds something that is not a saved rack ({error.problem})", remedy) from None
    if strange := sorted(present - saved.files.keys() - {RACK}):
        raise SavedRackError(folder, f"holds {strange[0]}, which does not belong to the saved rack", remedy)
    return folder
