"""Ranks as actors of a Ray cluster, on one node or many: READ FIRST of mode 'ray'.

groups     start_groups: a driver for each DeviceGroup; what cannot work is refused first
plan       which mesh, platform and share of a device every group gets
cluster    the cluster that is there, or one that starts and ends with the groups
placement  one bundle of cores and a device for every rank; groups that share use the same
ranks      RayRanks, which a Driver starts, watches, and starts again
actor      what runs on the nodes: it starts a rank's process, watches it, and ends with it
places     where ranks have come to be, and torchrun's variables made of that

Ray places processes and says when one is gone.  Commands, losses and recovery are the bus's own.
"""
