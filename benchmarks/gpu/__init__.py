"""What a card does with StackWise, in eight minutes: `python -m benchmarks.gpu --out FOLDER`; see docs/gpu.md."""
