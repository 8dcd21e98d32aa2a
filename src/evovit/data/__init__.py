"""Images and labels: built-in digit scenes, folders, tar files, shards, Hugging Face data sets."""

from evovit.data.digits import Digits, Scenes, colours, digit_scenes, digits

__all__ = ["Digits", "Scenes", "colours", "digit_scenes", "digits"]
