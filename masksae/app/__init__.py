"""What a person starts: the command line and what stands behind it. Nothing else imports this."""

DEFAULT = "laptop"
"""The profile of a command that names none."""
