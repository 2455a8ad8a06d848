"""Flower as transport: its SuperLink at the server, its Fleet API between them, couriers of ours at both ends.

    fedit run process -> courier.sock -> ServerCourier -> SuperLink = nginx = (mutual TLS) = SiteCourier -> worker.sock

Flower would run an app that arrives from the server in a new process for every message. Here no app is run at all: a
site's courier speaks the Fleet API itself, and the server's courier takes the run's task itself, so that code which
arrives is never asked for. The app that Flower wants for a run is a description without code. The SuperLink keeps
nothing on disk: whenever it or its run is gone, the server's courier registers the sites and starts a run again.
"""

from fedit.engines.flower.kits import make_kits, server_programs, site_programs

__all__ = ["make_kits", "server_programs", "site_programs"]
