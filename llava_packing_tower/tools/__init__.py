"""Programs around the package: doctor, bench and demo. Nothing but the command line imports them."""
