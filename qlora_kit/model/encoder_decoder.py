"""Encoder-decoders: a model that reads a source, and writes a target while it looks at the source.

Takes an architecture or a model; says which families are known, gives a skeleton the one embedding
and the head that its checkpoint has, and runs both halves. Never computes a logit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from qlora_kit.errors import ModelError
from qlora_kit.layers.projections import input_embedding
from qlora_kit.model.checkpoint import open_checkpoint

SEQ2SEQ_LM = "AutoModelForSeq2SeqLM"
FAMILIES = ("t5", "mt5")

_HEAD, _EMBEDDING = "lm_head.weight", "shared.weight"
_LAYERS = "num_decoder_layers"


def is_encoder_decoder(architecture: PreTrainedConfig) -> bool:
    """Whether a model reads a source in an encoder, and writes with a decoder."""
    return bool(getattr(architecture, "is_encoder_decoder", False))


def check_family(architecture: PreTrainedConfig) -> None:
    """Check that the kit knows an encoder-decoder.

    Raises:
        ModelError: it is of another family, or does not say how its decoder begins.
    """
    name = architecture.model_type
    if name not in FAMILIES:
        raise ModelError(
            f"{name}: an encoder-decoder that is not known here; expected one of "
            f"{', '.join(FAMILIES)} (T5, Flan-T5 and T5 v1.1 are t5); choose another model"
        )
    if getattr(architecture, "decoder_start_token_id", None) is None:
        raise ModelError(
            f"{name}: its config.json has no decoder_start_token_id; expected the token that a "
            "decoder begins with; add it (of T5 it is 0)"
        )


def check_dtype(architecture: PreTrainedConfig, dtype: torch.dtype | str) -> None:
    """Check that a model's activations fit the dtype that it computes in.

    Raises:
        ModelError: those of an encoder-decoder, and float16. T5 was trained in bfloat16, and its
            MLPs give values beyond 65,504.
    """
    if is_encoder_decoder(architecture) and dtype in ("float16", torch.float16):
        raise ModelError(
            f"--dtype float16: {architecture.model_type} computes values that float16 cannot hold; "
            "expected bfloat16 or float32; leave --dtype out, which takes one of them"
        )


def set_layers(architecture: PreTrainedConfig, layers: int) -> None:
    """Give the decoder as many layers as the encoder has been given."""
    if hasattr(architecture, _LAYERS):
        setattr(architecture, _LAYERS, layers)


def share_embedding(skeleton: PreTrainedModel) -> None:
    """Let both halves look ids up in one module, which then is placed and connected once."""
    skeleton.set_input_embeddings(skeleton.get_input_embeddings())


def shared_embedding(model: nn.Module) -> tuple[str, ...]:
    """Return the path of the embedding that both halves of an encoder-decoder look ids up in.

    LoRA is put on a module by one of its paths, and the halves hold this one by others, in PEFT
    too, where LoRA on it is trained by nothing.
    """
    config, table = getattr(model, "config", None), input_embedding(model)
    if config is None or table is None or not is_encoder_decoder(config):
        return ()
    return tuple(path for path, module in model.named_modules() if module is table)


def has_own_head(architecture: PreTrainedConfig, folder: Path | None) -> bool:
    """Whether the head of an encoder-decoder is a table of its own, and not its embedding.

    transformers says that it is tied for every T5, and finds out from the tensors, as is done here.

    Args:
        architecture: the architecture of the model.
        folder: the folder of its checkpoint; None where there is none.

    Raises:
        ModelError: the checkpoint is not readable.
    """
    # T5 v1.1, Flan-T5 and mT5 have a head of their own; the first T5 scales what it gives the
    # embedding.
    is_own = not getattr(architecture, "scale_decoder_outputs", False)
    if folder is None:
        return is_own
    source = open_checkpoint(folder)
    if _HEAD not in source.names:
        return False
    return is_own or not torch.equal(source.read(_HEAD), source.read(_EMBEDDING))


def untie_head(skeleton: PreTrainedModel) -> None:
    """Give the head of a skeleton a weight of its own."""
    head: Any = skeleton.get_output_embeddings()
    head.weight = nn.Parameter(torch.empty_like(head.weight), requires_grad=False)
    skeleton.all_tied_weights_keys.pop(_HEAD, None)


def is_head_tied(skeleton: PreTrainedModel) -> bool:
    """Whether the head of an encoder-decoder is its embedding."""
    return _HEAD in (skeleton.all_tied_weights_keys or {})


def stays_unpacked(architecture: PreTrainedConfig, name: str) -> bool:
    """Whether a weight of a linear layer is left as it is in a checkpoint of bitsandbytes.

    The layers `wo` of T5 are: transformers never makes packed layers of them.
    """
    return is_encoder_decoder(architecture) and name.endswith(".wo.weight")


def target_states(
    model: PreTrainedModel,
    source: Tensor,
    mask: Tensor | None,
    written: Tensor,
) -> Tensor:
    """Read a source, and return the hidden states that predict a target, (B, T, D).

    Args:
        model: an encoder-decoder, with or without LoRA.
        source: ids of the sources, (B, S).
        mask: (B, S), 1 for a token; None where no source is padded.
        written: ids that the decoder is given, (B, T): the target, shifted by one.
    """
    encoder, decoder = model.get_encoder(), model.get_decoder()
    added = None if mask is None else _added_to_scores(mask, model.config.dtype)
    states = encoder(input_ids=source, attention_mask=added).last_hidden_state
    outputs = decoder(
        input_ids=written,
        encoder_hidden_states=states,
        encoder_attention_mask=added,
        use_cache=False,
    )
    hidden: Tensor = outputs.last_hidden_state
    return hidden


def _added_to_scores(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what hides padding once it is added to the scores of attention, (B, 1, 1, S).

    Of a mask of ones and zeros transformers asks whether it hides anything, and takes less memory
    where it does not: a simulation on tensors without values would predict too little.
    """
    hidden = (1 - mask[:, None, None, :]).to(dtype)
    return hidden * torch.finfo(dtype).min
