"""Native resolution and video, from pixels to the tokens that the language model reads.

``resolution`` says how large an image becomes, ``settings`` what a configuration asks for, ``images`` prepares pixels,
``visuals`` reads what LLaVA passes around, ``projectors`` merge neighbors, ``tokens`` makes one sequence of visual
tokens per image or video. Nothing here imports LLaVA: ``hosts.native`` puts these parts into it.
"""
