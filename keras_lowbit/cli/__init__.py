"""The command line: `keras-lowbit train|quantize|evaluate|export|check|inspect`."""
