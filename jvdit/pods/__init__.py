"""What a program will take on a pod of TPUs that isn't there."""
