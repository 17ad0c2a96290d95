"""Checkpoints: the published layouts as tables, and what reads, writes and converts them.

layouts.py   the key tables            folder.py   safetensors files of a folder, checked
convert.py   their interpreter         io.py       load and save a model
hub.py       names on the hub          gguf.py, upcycle.py   checkpoints made from other ones
"""
