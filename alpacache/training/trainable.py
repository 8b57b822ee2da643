"""Which parameters are trained, their names in checkpoints, and how a checkpoint is put back into the base model.

Three choices: `all` (expert and projections), `head` (the two projections and the expert's final norm) and `lora`:
low-rank adapters on every linear layer of the expert, and the head in full, because it has under 2 M parameters and
nothing else knows of actions and t. Adapters are peft's, injected in place. peft's names stay in this module: a
checkpoint calls them `expert.layers.0.self_attn.q_proj.lora_A`, beside the public state-dict keys, and holds their
scale as the tensor `lora_scale`, so that its tensors alone are enough to merge them.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from alpacache import randomness
from alpacache.alpamayo.checkpoint import listed
from alpacache.alpamayo.family import EXPERT_LINEARS, HEAD_TENSORS
from alpacache.errors import UsageError

if TYPE_CHECKING:
    from alpacache.alpamayo import ActionExpert

LORA_SCALE = "lora_scale"
"""Name of the scalar tensor alpha / rank, by which B A is multiplied."""
_ADAPTER = "default"


def choose_trainable(
    expert: "ActionExpert", which: str, *, lora_rank: int = 16, lora_alpha: float | None = None, seed: int
) -> dict[str, nn.Parameter]:
    """Choose the parameters to train, by their names in checkpoints; all others stop requiring gradients.

    `lora` injects adapters, of the dtype and device of the weights they adapt, into the freshly loaded expert: B A
    scaled by alpha / rank, alpha by default 2 x rank. A is drawn from `seed` and B is zero, so its output is at first
    the base's, bit for bit. Raises `UsageError` for an impossible rank or alpha, or for `lora` without peft.
    """
    if which not in ("all", "head", "lora"):
        raise ValueError(f"which is {which!r}; expected 'all', 'head' or 'lora'.")
    adapters: dict[str, nn.Parameter] = {}
    if which == "lora":
        adapters = _inject(expert, lora_rank, 2.0 * lora_rank if lora_alpha is None else lora_alpha, seed)
    prefixes = "" if which == "all" else HEAD_TENSORS
    expert.requires_grad_(False)
    chosen = {name: p for name, p in expert.named_parameters() if name.startswith(prefixes)} | adapters
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen


def checkpoint_tensors(expert: "ActionExpert", parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that a checkpoint holds: those of `choose_trainable` and, where there are adapters, their scale."""
    tensors = {name: parameter.detach() for name, parameter in parameters.items()}
    return tensors | {name: buffer for name, buffer in expert.named_buffers(recurse=False) if name == LORA_SCALE}


@torch.no_grad()
def apply_checkpoint(
    expert: "ActionExpert", tensors: Mapping[str, Tensor], *, where: object = "the checkpoint"
) -> None:
    """Put a checkpoint's tensors into a freshly loaded expert, in place; adapters are merged into the weights.

    A merged weight is W + lora_scale B A in float32, rounded once to the weight's dtype. In bfloat16 that keeps 99 % of
    an update of 0.5 % of the weight's norm, but 71 % of one of 0.15 % (measured): a run of very few steps shows less
    than it has learnt. Merging adds, so applying the same adapters twice counts them twice.

    `tensors` are from `checkpoint_tensors`, on any device, in any floating dtype; `where` names them in errors. Raises
    `UsageError` naming every tensor that is missing, unexpected or misshapen, before anything is changed.
    """
    state = expert.state_dict()
    for name in changed_tensors(tensors, {name: tuple(tensor.shape) for name, tensor in state.items()}, where=where):
        state[name].copy_(merge(name, state[name], tensors))


def changed_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], *, where: object = "the checkpoint"
) -> list[str]:
    """Sorted names of the base's tensors that a checkpoint changes, of those with `shapes`.

    Raises `UsageError` naming every tensor that is missing, unexpected or misshapen.
    """
    adapted = sorted({name.rpartition(".")[0] for name in tensors if name.endswith((".lora_A", ".lora_B"))})
    parts = {f"{name}.lora_{part}" for name in adapted for part in "AB"}
    parts |= {LORA_SCALE} if adapted else set()
    if missing := parts - tensors.keys():
        raise UsageError(
            f"{where} lacks {listed(missing)}; adapters are lora_A, lora_B and {LORA_SCALE} together. Use a checkpoint "
            "that `alpacache train` wrote, unchanged."
        )
    plain = {name: tensor for name, tensor in tensors.items() if name not in parts}
    pairs = {f"{name}.weight": (tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]) for name in adapted}
    wrong = [_misfit(name, tensor.shape, shapes) for name, tensor in plain.items()]
    wrong += [_misfit(name, _product_shape(a, b), shapes) for name, (a, b) in pairs.items()]
    if any(wrong):
        raise UsageError(
            f"{where} holds tensors that the expert does not have: {listed(filter(None, wrong))}. Apply it once, to "
            "the base model that it was trained from."
        )
    return sorted(plain.keys() | pairs.keys())


def merge(name: str, base: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """One of the `changed_tensors` after training, in the dtype and on the device of the base model's.

    By `apply_checkpoint`'s formula and rounding.
    """
    if name in tensors:
        return tensors[name].to(base)
    layer = name.removesuffix(".weight")
    a, b = (tensors[f"{layer}.lora_{part}"].to(base.device, torch.float32) for part in "AB")
    return (base.float() + tensors[LORA_SCALE].to(base.device) * (b @ a)).to(base.dtype)


def enable_checkpointing(expert: "ActionExpert") -> None:
    """Keep only each layer's input for the backward and compute the rest again; results do not change.

    The backward then asks the prefix for a layer twice: for the second forward and for the gradient. Random state is
    not saved: the expert has no dropout, and a CUDA graph could not hold it.
    """
    model = expert.expert
    model.main_input_name = "inputs_embeds"  # else transformers warns that there are no embeddings
    # transformers 5.24 renames the method and warns of the old name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": False})


def _inject(expert: "ActionExpert", rank: int, alpha: float, seed: int) -> dict[str, nn.Parameter]:
    """Inject adapters into all decoder layers; return them by their names in checkpoints."""
    if rank < 1 or not (math.isfinite(alpha) and alpha > 0):
        raise UsageError(f"LoRA rank is {rank} and alpha {alpha}; expected a rank of at least 1 and an alpha above 0.")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError(f"training adapters needs peft ({error}): pip install 'alpacache[lora]'.") from error
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(EXPERT_LINEARS), lora_dropout=0.0, bias="none")
    # On the meta device: peft would take its initial values from the global random state.
    inject_adapter_in_model(config, expert, adapter_name=_ADAPTER, low_cpu_mem_usage=True)
    expert.register_buffer(LORA_SCALE, torch.tensor(alpha / rank), persistent=False)
    adapters = {}
    for name, module in expert.named_modules():
        if hasattr(module, "lora_A"):
            weight = module.base_layer.weight
            outputs, inputs = weight.shape
            # A is uniform within 1 / sqrt(inputs), as peft and the paper have it.
            uniform = torch.rand(rank, inputs, generator=randomness.generator("lora", seed, name))
            a, b = ((2 * uniform - 1) / math.sqrt(inputs)).to(weight), torch.zeros(outputs, rank).to(weight)
            adapters[f"{name}.lora_A"] = module.lora_A[_ADAPTER].weight = nn.Parameter(a)
            adapters[f"{name}.lora_B"] = module.lora_B[_ADAPTER].weight = nn.Parameter(b)
    return adapters


def _product_shape(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """Shape of B A; where they cannot be multiplied, both shapes one after the other, which fit nothing."""
    inner = a.shape[:1] == b.shape[1:]
    return (*b.shape[:1], *a.shape[1:]) if inner else (*b.shape, *a.shape)


def _misfit(name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    if name not in shapes:
        return name
    expected = shapes[name]
    return None if shape == expected else f"{name} {list(shape)} (expected {list(expected)})"
