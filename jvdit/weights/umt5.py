"""Rule table of UMT5 and T5 v1.1 encoders: from released tensor names to parameters.

The names are those of transformers, or those of Wan's original release, which has its
own class for UMT5.
"""

from jvdit.weights.rules import Rule

LAYOUTS = ("transformers", "original")

_ATTENTION = "encoder.block.{i}.layer.0.SelfAttention."
_MLP = "encoder.block.{i}.layer.1."
# transformers' name, the original name, and ours.
_LINEAR = (
    (_ATTENTION + "q", "blocks.{i}.attn.q", "block_{i}/query"),
    (_ATTENTION + "k", "blocks.{i}.attn.k", "block_{i}/key"),
    (_ATTENTION + "v", "blocks.{i}.attn.v", "block_{i}/value"),
    (_ATTENTION + "o", "blocks.{i}.attn.o", "block_{i}/out"),
    (_MLP + "DenseReluDense.wi_0", "blocks.{i}.ffn.gate.0", "block_{i}/gate"),
    (_MLP + "DenseReluDense.wi_1", "blocks.{i}.ffn.fc1", "block_{i}/fc_in"),
    (_MLP + "DenseReluDense.wo", "blocks.{i}.ffn.fc2", "block_{i}/fc_out"),
)
_NORM = (
    ("encoder.block.{i}.layer.0.layer_norm", "blocks.{i}.norm1", "attention_norm"),
    (_MLP + "layer_norm", "blocks.{i}.norm2", "mlp_norm"),
)
_BIAS = (_ATTENTION + "relative_attention_bias", "blocks.{i}.pos_embedding.embedding")


def rules(layout: str = "transformers", shared_bias: bool = False) -> list[Rule]:
    """The rule table of a text encoder.

    Args:
        layout: whose tensor names the table reads, one of `LAYOUTS`.
        shared_bias: all blocks share the relative position bias of the first (T5);
            False: each block has its own (UMT5).
    """
    which = LAYOUTS.index(layout)
    found = [
        Rule(f"{names[which]}.weight", f"{names[2]}/kernel", "o i -> i o")
        for names in _LINEAR
    ]
    found += [
        Rule(f"{names[which]}.weight", f"block_{{i}}/{names[2]}/scale")
        for names in _NORM
    ]
    bias, place = f"{_BIAS[which]}.weight", "block_{i}/relative_bias/embedding"
    if shared_bias:
        bias, place = bias.format(i=0), "relative_bias/embedding"
    found.append(Rule(bias, place))
    norm = ("encoder.final_layer_norm", "norm")[which]
    found.append(Rule(f"{norm}.weight", "final_norm/scale"))
    table = "token_embed/embedding"
    if which:
        return [*found, Rule("token_embedding.weight", table)]
    found.append(Rule("shared.weight", table))
    found.append(Rule("encoder.embed_tokens.weight", table, tied=True))
    return found
