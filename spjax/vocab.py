"""Special tokens of a unit language model, in fairseq's order.

`</s> u1 .. uT <s> l1 .. lK </s>`: an utterance starts and ends with EOS; BOS is the separator, which a prompt trains;
unit `u` is token `UNIT_OFFSET + u`, provided that dict.txt is in numeric order.
"""

BOS = 0
PAD = 1
EOS = 2
UNK = 3
UNIT_OFFSET = 4
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")

FIRST_POSITION = PAD + 1  # row of the sinusoidal table for the first token of a sequence

# Values of f0 in columns without a segment: F0_PAD before the opener; F0_BOS at the opener, separators and labels.
F0_PAD = float("-inf")
F0_BOS = float("inf")
