"""What a program does and costs, found without running it, and what machines measure."""
