"""How events and commands cross threads: the event bus, the mailbox of commands, and what waits in them."""
