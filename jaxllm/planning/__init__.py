"""What a program will need and cost on a topology that is not there: memory, FLOPs, collectives."""
