"""What lies on the disk so that no run is lost: checkpoints, snapshots, identity."""
