"""Rule table of UMT5 and T5 v1.1 encoders: from released tensor names to parameters.

The names are those of transformers, or those of Wan's original release, which has its
own class for UMT5.
"""

from jvdit.weights.rules import LAYOUTS, Rule, layers

# transformers' name, the original name, and ours.
_BLOCK = (
    ("0.SelfAttention.q", "attn.q", "query"),
    ("0.SelfAttention.k", "attn.k", "key"),
    ("0.SelfAttention.v", "attn.v", "value"),
    ("0.SelfAttention.o", "attn.o", "out"),
    ("1.DenseReluDense.wi_0", "ffn.gate.0", "gate"),
    ("1.DenseReluDense.wi_1", "ffn.fc1", "fc_in"),
    ("1.DenseReluDense.wo", "ffn.fc2", "fc_out"),
    ("0.layer_norm", "norm1", "attention_norm"),
    ("1.layer_norm", "norm2", "mlp_norm"),
)
_FINAL = ("encoder.final_layer_norm", "norm", "final_norm")
_BIAS = ("0.SelfAttention.relative_attention_bias", "pos_embedding.embedding")


def rules(layout: str = "diffusers", shared_bias: bool = False) -> list[Rule]:
    """The rule table of a text encoder.

    Args:
        layout: whose tensor names the table reads, one of `LAYOUTS`.
        shared_bias: all blocks share the relative position bias of the first (T5);
            False: each block has its own (UMT5).
    """
    which = LAYOUTS.index(layout)
    block = ("encoder.block.{i}.layer.", "blocks.{i}.")[which]
    bias, place = f"{block}{_BIAS[which]}.weight", "block_{i}/relative_bias/embedding"
    if shared_bias:
        bias, place = bias.format(i=0), "relative_bias/embedding"
    found = layers(_BLOCK, which, block, "block_{i}/")
    found += [*layers([_FINAL], which), Rule(bias, place)]
    table = "token_embed/embedding"
    if which:
        return [*found, Rule("token_embedding.weight", table)]
    tied = Rule("encoder.embed_tokens.weight", table, tied=True)
    return [*found, Rule("shared.weight", table), tied]
