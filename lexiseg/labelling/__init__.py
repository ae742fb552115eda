"""Labelling folders of pictures: on this machine or on a cluster, with a record from which a stopped run goes on."""
