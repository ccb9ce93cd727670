"""What every script needs and no paper defines: networks, loading, data, images, runs."""
