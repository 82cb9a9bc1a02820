"""A small real system to back up, destroy and restore: in containers, or as processes of this machine."""
