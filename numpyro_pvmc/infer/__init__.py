"""The frame of all engines: training, checks, schedules, draws."""
