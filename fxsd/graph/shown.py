"""A graph to read: what a model was seen to run, where no graph of its own has the sites."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxsd.find.values import op_name
from fxsd.graph.graphmodule import copy_graph, dump, read

KEY = "fxsd_shown"  # the attribute of a transformed model that holds such graphs


class Named:
    """Stands for a function that is not to run again."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name
        self.__module__ = "torch"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{self.__name__} is only named in this graph, which shows what a model was seen to run.")


class Shown:
    """Holds a graph; copied and pickled with the model, without the functions that it calls."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph

    def __deepcopy__(self, memo: dict[int, Any]) -> Shown:
        return Shown(copy_graph(self.graph))

    def __reduce__(self) -> tuple[Any, ...]:
        graph = copy_graph(self.graph)
        for node in graph.nodes:
            if node.op == "call_function":
                node.target = Named(op_name(node))
        return _again, (dump(graph),)


def _again(rows: list[tuple[Any, ...]]) -> Shown:
    return Shown(read(rows))
