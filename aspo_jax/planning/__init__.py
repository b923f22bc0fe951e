"""What a run takes before it is run: devices, programs, memory and arithmetic."""
