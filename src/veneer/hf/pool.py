"""AdapterPool: hundreds of adapters for one model, of which only as many are in memory as fit."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from veneer.core.config import CONFIG_NAME, PeftConfig
from veneer.engine import checkpoint
from veneer.engine.adapted import BASE
from veneer.engine.tuner import Tuner
from veneer.hf.model import PeftModel
from veneer.hf.tasks import get_peft_model


class AdapterPool:
    """Adapters in folders, put into a model when they are asked for; the least recently used make room.

    An adapter has three places: its folder, main memory (its file's tensors, up to ``cpu_bytes``), and the model (up to
    ``max_bytes``). Threads take turns: a call that uses the model goes inside ``use``.

        pool = AdapterPool(base, "adapters/", max_bytes=64 << 20)
        with pool.use("french") as model:
            model(**inputs)
        with pool.use("french", "german") as model:  # a mixed batch, one name a row
            model(**inputs, adapter_names=["french", "german", "__base__"])

    Args:
        model: the base model, or a ``PeftModel``, whose own adapters stay and do not count.
        folders: name -> adapter folder, or one folder whose sub-folders are adapters.
        max_bytes: bound on the tensors of pooled adapters in the model. What one call uses may exceed it together
            only if it does by itself, which is refused.
        cpu_bytes: bound on the tensors kept in main memory for adapters that are not in the model; 0 reads the
            folder each time.

    Raises:
        ValueError: no adapter in the folder, or a bound that is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        folders: Mapping[str, str | Path] | str | Path,
        max_bytes: int = 1 << 30,
        cpu_bytes: int = 0,
    ):
        if max_bytes <= 0 or cpu_bytes < 0:
            raise ValueError(f"max_bytes must be positive and cpu_bytes not negative, not {max_bytes}, {cpu_bytes}.")
        self.max_bytes, self.cpu_bytes = max_bytes, cpu_bytes
        self._folders = {n: Path(p) for n, p in folders.items()} if isinstance(folders, Mapping) else _below(folders)
        if not self._folders:
            raise ValueError("The pool has no adapters; give name -> folder.")
        self.model = model if isinstance(model, PeftModel) else _empty(model, next(iter(self._folders.values())))
        self._resident: OrderedDict[str, int] = OrderedDict()  # name -> bytes, least recently used first
        self._warm: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._lock = threading.RLock()
        self._depth = 0
        self.loads = self.evictions = 0

    @property
    def names(self) -> list[str]:
        """Every adapter that can be asked for."""
        with self._lock:
            return list(self._folders)

    @property
    def resident(self) -> list[str]:
        """The adapters in the model, least recently used first."""
        with self._lock:
            return list(self._resident)

    @property
    def bytes(self) -> int:
        """What the pooled adapters in the model take."""
        with self._lock:
            return sum(self._resident.values())

    def register(self, name: str, folder: str | Path) -> None:
        """Offer one more adapter, or another folder under a name that is not in use.

        Raises:
            ValueError: the folder holds no adapter.
        """
        if not (Path(folder) / CONFIG_NAME).is_file():
            raise ValueError(f"{folder} holds no {CONFIG_NAME}, so it is not an adapter folder.")
        with self._lock:
            self.evict(name)
            self._warm.pop(name, None)
            self._folders[name] = Path(folder)

    @contextlib.contextmanager
    def use(self, *names: str) -> Iterator[nn.Module]:
        """Within: the model with these adapters in it, for this thread alone.

        One name is made active. Of several none is: name one for each row by ``adapter_names``, or choose by
        ``set_adapter``.

        Raises:
            ValueError: an unknown name, adapters that exceed ``max_bytes`` together, or a folder that does not fit
                the model.
        """
        with self._lock:
            if self._depth:
                raise ValueError("This thread is inside use() already; ask for all adapters of a call at once.")
            wanted = [n for n in dict.fromkeys(names) if n != BASE]
            for name in wanted:
                if name not in self._folders:
                    raise ValueError(f"The pool has no adapter '{name}'; it has {len(self._folders)} others.")
            tuner = self.model.base_model
            before, trained = tuner.state.active, bool(tuner._training)
            self._depth += 1
            try:
                for name in wanted:
                    self._bring(name, wanted)
                tuner.set_active(*(wanted if len(wanted) == 1 else ()), trainable=False)
                yield self.model
            finally:
                self._depth -= 1
                tuner.route(None)
                tuner.set_active(*(n for n in before if n in tuner.configs), trainable=trained)

    def evict(self, name: str) -> None:
        """Take one adapter out of the model, if it is there.

        Raises:
            ValueError: inside ``use``.
        """
        with self._lock:
            if self._depth:
                raise ValueError(f"'{name}' may be in use; evict it after the call.")
            if name in self._resident:
                self._drop(name)

    def _bring(self, name: str, pinned: list[str]) -> None:
        if name in self._resident:
            self._resident.move_to_end(name)
            return
        tensors = self._warm.pop(name, None) or checkpoint.read(self._folders[name])
        size = _bytes(tensors)
        held = sum(self._resident.get(n, 0) for n in pinned)
        if held + size > self.max_bytes:
            raise ValueError(
                f"The adapters of one call need {held + size} bytes with '{name}', above max_bytes={self.max_bytes}; "
                "raise it or use fewer at once."
            )
        while sum(self._resident.values()) + size > self.max_bytes:
            self._drop(next(n for n in self._resident if n not in pinned))
        self._load(name, tensors)
        self._resident[name] = size
        self.loads += 1

    def _load(self, name: str, tensors: dict[str, Tensor]) -> None:
        tuner: Tuner = self.model.base_model
        config = PeftConfig.read(self._folders[name])
        config.inference_mode = True
        tuner.add(name, config)
        try:
            checkpoint.put(tuner, name, tensors)
        except BaseException:
            tuner.delete(name)
            raise

    def _drop(self, name: str) -> None:
        tuner: Tuner = self.model.base_model
        size = self._resident.pop(name)
        self.evictions += 1
        if 0 < size <= self.cpu_bytes:
            found = checkpoint.tensors(tuner, name, convert=False)
            self._warm[name] = {k: v.detach().to("cpu", copy=True) for k, v in found.items()}
            while sum(map(_bytes, self._warm.values())) > self.cpu_bytes:
                self._warm.popitem(last=False)
        tuner.delete(name)


def _empty(model: nn.Module, folder: Path) -> PeftModel:
    """The model under the class that its adapters' task wants, with no adapter in it."""
    whole = get_peft_model(model, PeftConfig.read(folder), "first")
    whole.delete_adapter("first")
    return whole


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _below(folder: str | Path) -> dict[str, Path]:
    found = {p.parent.name: p.parent for p in sorted(Path(folder).glob(f"*/{CONFIG_NAME}"))}
    if not found:
        raise ValueError(f"No sub-folder of {folder} holds an {CONFIG_NAME}; give name -> folder.")
    return found
