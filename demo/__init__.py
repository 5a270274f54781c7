"""One command that shows the whole system: vLLM serves the embedded checkpoint and finds pass keys.

hatch run demo
hatch run demo -- --document FILE --question TEXT
"""
