"""An evaluation by command: its folder, its samples, its report, and verdicts anew."""
