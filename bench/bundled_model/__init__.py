"""The bundled model: its puzzles, data, tokenizer, training and measurement.

Run from `bench/`: `python -m bundled_model.train --help`, then `python -m bundled_model.measure`.
"""
