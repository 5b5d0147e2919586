"""What run directories say, for readers in any process, without torch."""
