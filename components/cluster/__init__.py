"""Heavy steps as RayJobs and the endpoint as a RayService: how steps use the Kubernetes API."""
