"""The symbols of a unit language model (fairseq's dictionary order).

`</s> u1 .. uT <s> l1 .. lK </s>`: an utterance starts and ends with EOS; BOS is the separator that a
prompt trains; unit `u` is token `UNIT_OFFSET + u`, which holds as long as dict.txt is in numeric order.
"""

BOS = 0
PAD = 1
EOS = 2
UNK = 3
UNIT_OFFSET = 4
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")

FIRST_POSITION = PAD + 1  # row of the sinusoidal table that the first token of a unit LM's sequence uses

# f0 where there is no segment: before a multi-stream LM's opener; and of the opener, separators and labels.
F0_PAD = float("-inf")
F0_BOS = float("inf")
