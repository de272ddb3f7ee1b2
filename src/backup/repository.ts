import type { CreateRepositoryOptions, OpenRepositoryOptions, Repository } from './contract.ts'

export async function createRepository(
  path: string,
  options: CreateRepositoryOptions = {},
): Promise<Repository> {
  throw new Error(`to come ${path} ${String(options.password)}`)
}
export async function openRepository(path: string, options: OpenRepositoryOptions = {}): Promise<Repository> {
  throw new Error(`to come ${path} ${String(options.password)}`)
}
