"""CUDA graphs of a stage's layers in training: two launches a micro-batch in place of thousands.

Where few tokens execute, or matrices are cut over ranks, a layer takes longer to launch than to run. Shapes
are fixed (``routing.capacity_factor``), so one micro-batch's forward pass of all layers is captured, and its
backward pass, which also adds the gradients up.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from skipmega.models.layer import LayerContext, RoutingRecord
from skipmega.routing.router import RouterInputs

Records = dict[int, RoutingRecord]
RunLayers = Callable[[Tensor, LayerContext, Mapping[int, RouterInputs]], tuple[Tensor, Records]]

_WARM_UPS = 2  # kernels are compiled and libraries choose theirs before anything is captured
_RECORDED = ("chosen", "executed", "score", "auxiliary", "entropy")  # the tensors of a RoutingRecord


class LayerGraphs:
    """Runs layers as captured graphs, from the first call on.

    The activations that the graphs work in stay theirs, of as many micro-batches as a pipeline has in flight
    at a time; for each there is a pair of graphs.

    Args:
        run: runs the layers; shapes and all but the tensors that :class:`_Inputs` holds must be the same in
            every call.
        layers: those.
        sums: of the gradients of all parameters, which backward adds to. Neither ever moves.
    """

    def __init__(
        self, run: RunLayers, layers: Iterable[nn.Module], sums: Mapping[nn.Parameter, Tensor]
    ) -> None:
        self._run = run
        layers = list(layers)
        self._counts = [len(list(layer.parameters())) for layer in layers]
        self._modules = [module for layer in layers for module in layer.modules()]
        self._parameters = [p for module in self._modules for p in module.parameters(recurse=False)]
        self._sums = [sums[parameter] for parameter in self._parameters]
        self._places = [parameter.data_ptr() for parameter in self._parameters]
        self._pairs: list[_Pair] = []

    def __call__(
        self, hidden: Tensor, context: LayerContext, inputs: Mapping[int, RouterInputs]
    ) -> tuple[Tensor, Records]:
        """Run the layers. The records are overwritten by the next call, the rest by the next after this one's
        backward pass.

        Args:
            hidden: [rows of this rank, b, hidden], with a gradient.
            context: what all layers share.
            inputs: of each routed layer's router.
        """
        assert self._places == [parameter.data_ptr() for parameter in self._parameters]
        given = _Inputs.of(hidden, context, inputs)
        pair = next((pair for pair in self._pairs if not pair.in_flight), None)
        if pair is None:
            pair = self._capture(given)
            self._pairs.append(pair)
        out, *recorded = _Replay.apply(pair, *given.tensors)
        return out, pair.records(recorded)

    def _capture(self, arguments: "_Inputs") -> "_Pair":
        given = replace(arguments, tensors=[tensor.detach().clone() for tensor in arguments.tensors])
        given.tensors[0].requires_grad_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # other threads (loading data, watching collectives) may use the device meanwhile
        capture = partial(torch.cuda.graph, stream=stream, capture_error_mode="thread_local")
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with self._stand_ins() as parameters:
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    outputs, _ = self._forward(given)
                    _, *of_parameters = _gradients(given, parameters, outputs, _zeros(outputs))
                    self._add(of_parameters, torch.zeros_like)
                    del outputs, of_parameters
            with capture(forward):
                outputs, records = self._forward(given)
            gradients = _zeros(outputs)
            with capture(backward, pool=forward.pool()):
                of_hidden, *of_parameters = _gradients(given, parameters, outputs, gradients)
                self._add(of_parameters)
        torch.cuda.current_stream().wait_stream(stream)
        return _Pair(
            forward,
            backward,
            given=given,
            outputs=[output.detach() for output in outputs],
            gradients=gradients,
            of_hidden=of_hidden,
            counts={layer: (record.slots, record.moved) for layer, record in records.items()},
        )

    def _forward(self, given: "_Inputs") -> tuple[list[Tensor], Records]:
        out, records = self._run(*given.restored())
        fields = _RECORDED if records else ()
        return [out, *(torch.stack([getattr(r, name) for r in records.values()]) for name in fields)], records

    def _add(
        self, gradients: Sequence[Tensor | None], to: Callable[[Tensor], Tensor] = lambda total: total
    ) -> None:
        """Add the gradients of all parameters to their sums, or ``to`` what is made of these; by layers, so
        that layers of a kind are one program."""
        each = iter(zip(self._sums, gradients, strict=True))
        for count in self._counts:
            taught = [(to(total), g) for total, g in islice(each, count) if g is not None]
            _add_up([total for total, _ in taught], [g for _, g in taught])

    @contextmanager
    def _stand_ins(self) -> Iterator[list[nn.Parameter]]:
        """Put others, of the same memory, in the parameters' places; yields them.

        Autograd has a leaf's gradient waited for on the stream where the leaf was first used. DeepSpeed's
        hooks keep the parameters' first use for good, on a stream that no capture may touch.
        """
        names = [(m, name) for m in self._modules for name, _ in m.named_parameters(recurse=False)]
        stand_ins = [nn.Parameter(parameter.detach()) for parameter in self._parameters]
        for (module, name), stand_in in zip(names, stand_ins, strict=True):
            setattr(module, name, stand_in)
        try:
            yield stand_ins
        finally:
            for (module, name), parameter in zip(names, self._parameters, strict=True):
                setattr(module, name, parameter)


@torch.compile(dynamic=False)
def _add_up(totals: list[Tensor], gradients: list[Tensor]) -> None:
    """In one pass each: torch's own kernel for two dtypes moves half as many bytes a second."""
    for total, gradient in zip(totals, gradients, strict=True):
        total.add_(gradient)


def _zeros(outputs: list[Tensor]) -> list[Tensor | None]:
    return [torch.zeros_like(output) if output.requires_grad else None for output in outputs]


def _gradients(
    given: "_Inputs", parameters: list[nn.Parameter], outputs: list[Tensor], gradients: list[Tensor | None]
) -> tuple[Tensor, ...]:
    """Gradients of the hidden states and of the parameters."""
    taught = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
    return torch.autograd.grad(
        [output for output, _ in taught],
        [given.tensors[0], *parameters],
        [gradient for _, gradient in taught],
        allow_unused=True,
    )


@dataclass(frozen=True)
class _Inputs:
    """What differs between micro-batches, as few tensors: hidden states, document starts, and of all routers
    thresholds, temperature and noise. ``context`` and ``layers`` are the same in all."""

    tensors: list[Tensor]
    context: LayerContext
    layers: list[int]
    noisy: bool

    @classmethod
    def of(cls, hidden: Tensor, context: LayerContext, inputs: Mapping[int, RouterInputs]) -> "_Inputs":
        tensors = [hidden] if context.since is None else [hidden, context.since]
        each = list(inputs.values())
        noise = [router.noise for router in each if router.noise is not None]
        if each:
            tensors += [torch.stack([router.threshold for router in each]), each[0].temperature]
        if noise:
            tensors.append(torch.stack(noise))
        return cls(tensors, context, list(inputs), bool(noise))

    def restored(self) -> tuple[Tensor, LayerContext, dict[int, RouterInputs]]:
        hidden, *rest = self.tensors
        since = None if self.context.since is None else rest.pop(0)
        if not self.layers:
            return hidden, replace(self.context, since=since), {}
        thresholds, temperature = rest[:2]
        noise = rest[2].unbind() if self.noisy else [None] * len(self.layers)
        each = zip(self.layers, thresholds.unbind(), noise, strict=True)
        inputs = {layer: RouterInputs(threshold, temperature, drawn) for layer, threshold, drawn in each}
        return hidden, replace(self.context, since=since), inputs


@dataclass
class _Pair:
    """The graphs of a micro-batch, and the tensors that they read and write."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    given: _Inputs
    outputs: list[Tensor]
    gradients: list[Tensor | None]
    of_hidden: Tensor
    counts: dict[int, tuple[int, int]]
    in_flight: bool = False

    def records(self, stacked: list[Tensor]) -> Records:
        fields = zip(*(tensor.unbind() for tensor in stacked), strict=True)
        return {
            layer: RoutingRecord(**dict(zip(_RECORDED, tensors, strict=True)), slots=slots, moved=moved)
            for (layer, (slots, moved)), tensors in zip(self.counts.items(), fields, strict=True)
        }


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pair: _Pair, *tensors: Tensor) -> tuple[Tensor, ...]:
        for place, tensor in zip(pair.given.tensors, tensors, strict=True):
            assert place.shape == tensor.shape  # or it might be broadcast
            place.detach().copy_(tensor)
        pair.forward.replay()
        pair.in_flight = True
        ctx.pair = pair
        outputs = tuple(output.view_as(output) for output in pair.outputs)
        taught = zip(outputs, pair.gradients, strict=True)
        ctx.mark_non_differentiable(*(output for output, gradient in taught if gradient is None))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pair: _Pair = ctx.pair
        for place, gradient in zip(pair.gradients, gradients, strict=True):
            if place is not None:
                place.copy_(gradient)
        pair.backward.replay()
        pair.in_flight = False
        # a copy: a pipeline may still be sending it when the next backward pass writes
        return None, pair.of_hidden.clone(), *(None for _ in pair.given.tensors[1:])
