"""The parameter tree: what a model is made of, what of it is trained, and what it weighs.

    OPTForCausalLM  1,316,020,224 parameters, 5.26 GB, 262,144 trainable
    └─ model (OPTModel)  1,316,020,224, 5.26 GB, 262,144 trainable
       └─ decoder (OPTDecoder)  ...
          └─ layers (ModuleList)  ...
             ├─ 0-21 (OPTDecoderLayer) x22  1,107,881,984, 4.43 GB
             │  └─ ...
             └─ 22-23 (OPTDecoderLayer) x2  100,978,688, 403.91 MB, 262,144 trainable
                └─ self_attn (OPTAttention)
                   └─ k_proj, v_proj, q_proj, out_proj (Linear + LoRA)  weight [2048, 2048], bias [2048]
                      ├─ lora_A (Linear)  weight [8, 2048]*
                      └─ lora_B (Linear)  weight [2048, 8]*

The drawing follows the module tree of OpenDelta's Visualization. Only names, shapes and dtypes are read, never values,
so it works on the meta device; torch itself is not imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from torch import Tensor, nn

TRAINED = "bold green"
QUIET = "dim"


class TensorLine(NamedTuple):
    """One parameter tensor as it is drawn. `tied_to` is the path under which it was counted already, or ''."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    tied_to: str


@dataclass(frozen=True)
class Node:
    """A module, or several siblings that are the same module but for their names.

    `total`, `trainable` (parameters) and `nbytes` cover all the folded siblings and everything below them.
    """

    names: tuple[str, ...]
    kind: str
    tensors: tuple[TensorLine, ...]
    children: tuple[Node, ...]
    total: int
    trainable: int
    nbytes: int

    def is_same_as(self, other: Node) -> bool:
        """Same class, tensors (names, shapes, dtypes, trainability, ties) and, recursively, the same children."""
        return (self.kind, self.tensors, self.children) == (other.kind, other.tensors, other.children)

    @property
    def numbered(self) -> bool:
        """An element of a ModuleList or Sequential: a block, an expert."""
        return all(name.isdigit() for name in self.names)

    @property
    def label(self) -> str:
        """`22-23 (OPTDecoderLayer) x2`, `q_proj, k_proj (Linear)`, or the bare class name at the root."""
        if not any(self.names):
            return self.kind
        if len(self.names) > 1 and self.numbered:
            return f"{self.names[0]}-{self.names[-1]} ({self.kind}) x{len(self.names)}"
        return f"{', '.join(self.names)} ({self.kind})"


@dataclass(frozen=True)
class ParameterTree:
    """The drawing and its sums. `trainable` and `total` are parameters of the backbone with its adapters.

    A tied tensor is counted once, where it is met first; buffers are not counted; heads on top of it are counted apart.
    """

    root: Node
    heads: tuple[Node, ...]

    @property
    def trainable(self) -> int:
        return self.root.trainable

    @property
    def total(self) -> int:
        return self.root.total

    def text(self) -> str:
        """The tree without colour, lines joined by newlines: for files and the HTML page."""
        return "\n".join(line.plain for line in self._lines())

    def print(self, console: Console | None = None) -> None:
        """The tree in colour. Lines are never broken by rich, so that the last two can be read by a program."""
        console = console or Console()
        for line in self._lines():
            console.print(line, soft_wrap=True, highlight=False)

    def _lines(self) -> list[Text]:
        lines = _draw(self.root, "", "", summed=True)
        for head in self.heads:
            lines += _draw(head, "", "", summed=True)
        share = 100 * self.trainable / self.total if self.total else 0.0
        lines.append(Text("* trainable", style=TRAINED))
        lines.append(Text(f"Trainable {self.trainable:,} of {self.total:,} parameters ({share:.4f} %)", style="bold"))
        for head in self.heads:
            if head.trainable:
                name = head.names[0].replace("_", " ").capitalize()
                lines.append(Text(f"{name}: {head.trainable:,} trainable", style="bold"))
        return lines


def parameter_tree(backbone: nn.Module, heads: nn.ModuleDict | None = None) -> ParameterTree:
    """Reads the module tree of a Hugging Face or PEFT model, on any device, meta included.

    Counted: every parameter tensor below `backbone`, adapters included, once each. OPT's `lm_head`, tied to
    `embed_tokens`, adds nothing and says so. Not counted: buffers (rotary tables, masks), and the heads (PPO's value
    head and branch; ILQL's V, Q and targets of Q), which have sums of their own. A 4-bit weight counts its elements,
    not its packed bytes. Trainable means `requires_grad`.

    For OPT-1.3B with LoRA r=8 on q, k, v and out of its last two blocks this is 262,144 trainable
    (2 blocks x 4 projections x 8 x (2048 + 2048)) of 1,316,020,224 (1,315,758,080 of the model and the adapter's).

    PEFT's outer levels (`base_model.model`) and a layer's `base_layer` are drawn as one with what they wrap;
    modules without parameters are left out; like siblings in a row are folded into one.
    """
    seen: dict[int, str] = {}
    root = _read("", _unwrap(backbone), "", seen)
    named = [(name, head) for name, head in heads.items() if any(True for _ in head.parameters())] if heads else []
    return ParameterTree(root, tuple(_read(name, head, name, seen) for name, head in named))


def format_bytes(count: float) -> str:
    """`5.26 GB`: decimal units, two digits; whole bytes below a kilobyte."""
    for exponent, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**exponent:
            return f"{count / 1000**exponent:.2f} {unit}"
    return f"{count:.0f} B"


def _is_peft(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.")


def _unwrap(module: nn.Module) -> nn.Module:
    """Goes below PEFT's wrappers that hold one module and nothing else (PeftModelForCausalLM, LoraModel)."""
    while _is_peft(module) and not module._parameters and len(module._modules) == 1:
        (inner,) = module._modules.values()
        if inner is None:
            break
        module = inner
    return module


def _read(name: str, module: nn.Module, path: str, seen: dict[int, str]) -> Node:
    """`seen` maps a tensor's id to the path where it was counted, and grows. The module keeps its tensors alive."""
    kind = type(module).__name__
    base = module._modules.get("base_layer") if _is_peft(module) else None
    adapters: dict[str, nn.Module] = {}
    if base is not None:
        tuner = type(module).__module__.split(".")[2]
        adapters = _adapter_modules(module)
        module, kind = base, f"{type(base).__name__} + {'LoRA' if tuner == 'lora' else tuner}"

    tensors: list[TensorLine] = []
    total = trainable = nbytes = 0
    # The registries themselves: named_parameters() and named_children() leave out what they have met before.
    for own, tensor in module._parameters.items():
        if tensor is None:
            continue
        owner = seen.get(id(tensor), "")
        shape = _logical_shape(tensor)
        tensors.append(TensorLine(own, shape, str(tensor.dtype), tensor.requires_grad, owner))
        if not owner:
            seen[id(tensor)] = f"{path}.{own}".removeprefix(".")
            total += math.prod(shape)
            trainable += math.prod(shape) if tensor.requires_grad else 0
            nbytes += tensor.numel() * tensor.element_size()

    children: list[Node] = []
    for below, child in [*module._modules.items(), *adapters.items()]:
        if child is None or next(child.parameters(), None) is None:
            continue
        node = _read(below, child, f"{path}.{below}".removeprefix("."), seen)
        total, trainable, nbytes = total + node.total, trainable + node.trainable, nbytes + node.nbytes
        if children and _foldable(children[-1], node):
            children[-1] = _fold(children[-1], node)
        else:
            children.append(node)
    return Node((name,), kind, tuple(tensors), tuple(children), total, trainable, nbytes)


def _adapter_modules(layer: nn.Module) -> dict[str, nn.Module]:
    """The adapter's modules of one PEFT layer by a readable name: `lora_A`, or `lora_A.other` if not called default."""
    found: dict[str, nn.Module] = {}
    for name, holder in layer._modules.items():
        if name == "base_layer" or holder is None:
            continue
        if holder._parameters:  # a ParameterDict: LoRA on an embedding
            found[name] = holder
        for adapter, module in holder._modules.items():
            if module is not None:
                found[name if adapter == "default" else f"{name}.{adapter}"] = module
    return found


def _foldable(last: Node, new: Node) -> bool:
    """Like neighbours: numbers without a gap (a Sequential's 0 and 2 have something between them), or all names."""
    if last.numbered and new.numbered and int(new.names[0]) != int(last.names[-1]) + 1:
        return False
    return last.is_same_as(new) and last.numbered == new.numbered


def _fold(last: Node, new: Node) -> Node:
    return replace(
        last,
        names=last.names + new.names,
        total=last.total + new.total,
        trainable=last.trainable + new.trainable,
        nbytes=last.nbytes + new.nbytes,
    )


def _logical_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape in elements: bitsandbytes packs two 4-bit numbers into a byte and keeps the shape in `quant_state`."""
    return tuple(getattr(getattr(tensor, "quant_state", None), "shape", tensor.shape))


def _draw(node: Node, first: str, rest: str, summed: bool) -> list[Text]:
    """The lines of a subtree: `first` goes before its own line, `rest` before those below.

    Sums stand on every line down to the blocks; within a block there are only shapes.
    """
    line = Text.assemble((first, QUIET), node.label)
    gap = "  "
    for tensor in node.tensors:
        line.append(gap)
        line.append(f"{tensor.name} {list(tensor.shape)}", style=TRAINED if tensor.trainable else "")
        if tensor.trainable:
            line.append("*", style=TRAINED)
        if tensor.tied_to:
            line.append(f" tied to {tensor.tied_to}", style=QUIET)
        gap = ", "
    if summed and node.total:
        unit = "" if any(node.names) else " parameters"
        line.append(f"  {node.total:,}{unit}, {format_bytes(node.nbytes)}", style=QUIET)
        if node.trainable:
            line.append(f", {node.trainable:,} trainable", style=TRAINED)
    lines = [line]
    for child in node.children:
        last = child is node.children[-1]
        lines += _draw(
            child, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "), summed and not node.numbered
        )
    return lines
