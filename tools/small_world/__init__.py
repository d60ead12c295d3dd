"""The small world: captioned pictures drawn from explicit attributes, and a scorer that reads them back.

It stands in for photographs wherever a question needs an exact answer ("was the concept learned?").
numpy, Pillow and scipy only; nothing here knows MindSpore.
"""
