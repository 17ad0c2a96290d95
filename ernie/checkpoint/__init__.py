"""Checkpoints: the published layouts as tables, and what reads, writes and converts them.

layouts.py   the key tables         folder.py   safetensors files of a folder, checked and read
convert.py   their interpreter      writer.py   the same files written
io.py        load and save          hub.py      names on the hub
gguf.py, upcycle.py                 checkpoints made from other ones
gguf_export.py                      the way back, with gguf_names.py and gguf_tokenizer.py
"""
