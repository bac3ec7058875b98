"""The Prefect flows that grow a rack, the command line and the pages. Only modules directly in here import Prefect."""
