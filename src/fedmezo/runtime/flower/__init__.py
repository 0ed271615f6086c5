"""The same run over Flower: its programs, its messages, and the two apps that Flower runs."""
