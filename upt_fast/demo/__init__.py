"""A newcomer's demo that downloads nothing: a tiny CLIP, scikit-learn's handwritten digits, and UPT on top."""
