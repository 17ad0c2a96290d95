"""Images and video: from patches to rows of the language model."""
