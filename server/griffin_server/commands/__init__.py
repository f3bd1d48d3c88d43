"""The commands of `griffin`, one file each."""
