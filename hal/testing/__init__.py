"""What a backend's author tests with: strategies for declared inputs."""
