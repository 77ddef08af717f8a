"""What a checkpoint, a recipe or a plan holds, and what is wrong with it: commands that write nothing."""
