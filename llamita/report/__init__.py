"""The report of a run as one HTML page: `page.write(run_folder)`."""
