"""Native resolution and video, from pixels to the tokens that the language model reads.

``visual_inputs`` reads what LLaVA passes around, ``projectors`` merge neighbors, ``visual_tokens`` makes one sequence
of visual tokens per image or video, ``packed_decoder`` and ``supervised_head`` are the decoder's training step. How
large an image becomes is in ``data``. Nothing here imports LLaVA: ``integrations.llava`` puts these parts into it.
"""
