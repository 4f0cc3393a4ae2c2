"""What networks of different origin take the same inputs to mean."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Conventions:
    """What a network takes its inputs to mean. The defaults are our own models'.

    Attributes:
        seconds: positions in time count seconds; False: latent frames, as Wan's.
        pad_text: every token sees `text_length` text states, zero past the end of the
            prompt, as Wan's; False: the states of the prompt alone.
        clean_frames: a given first frame is known as clean tokens.
    """

    seconds: bool = True
    pad_text: bool = False
    clean_frames: bool = False
