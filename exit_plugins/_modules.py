"""torch's containers with the type of what they hold, for the type checker; when run they are torch's own classes.

torch says of an entry only that it is a ``Module``, and of a Module's attributes that each is a Tensor or a Module. Who
builds ``ModuleList(DenseLayer(...) for ...)`` from here keeps the entries' class in the checker's eyes; pickles, state
dicts, TorchScript and ``isinstance`` see ``nn.ModuleList`` as ever. It cannot be subscripted when run: name
``ModuleList[DenseLayer]`` in annotations inside functions, which are not evaluated, and elsewhere in quotes.
"""

from typing import TYPE_CHECKING

from torch import nn

__all__ = ["ModuleDict", "ModuleList"]

if TYPE_CHECKING:
    from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
    from typing import Generic, TypeVar, overload

    M = TypeVar("M", bound=nn.Module)

    class ModuleList(nn.ModuleList, Generic[M]):
        def __init__(self, modules: Iterable[M] | None = None) -> None: ...

        @overload
        def __getitem__(self, idx: slice) -> "ModuleList[M]": ...

        @overload
        def __getitem__(self, idx: int) -> M: ...

        def __getitem__(self, idx: int | slice) -> "M | ModuleList[M]": ...

        def __iter__(self) -> Iterator[M]: ...

    class ModuleDict(nn.ModuleDict, Generic[M]):
        def __init__(self, modules: Mapping[str, M] | None = None) -> None: ...

        def __getitem__(self, key: str) -> M: ...

        def items(self) -> ItemsView[str, M]: ...

        def values(self) -> ValuesView[M]: ...

else:
    ModuleDict, ModuleList = nn.ModuleDict, nn.ModuleList
