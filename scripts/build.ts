/** npm run build: sources -> dist/, compiled JavaScript and declarations for the package. */
import { execFileSync } from 'node:child_process'
import { cpSync, existsSync, rmSync } from 'node:fs'
import { join } from 'node:path'

const root = join(import.meta.dirname, '..')
const dist = join(root, 'dist')
rmSync(dist, { recursive: true, force: true })
execFileSync(process.execPath, [join(root, 'node_modules/typescript/bin/tsc'), '-p', 'tsconfig.build.json'], {
  cwd: root,
  stdio: 'inherit',
})
if (!existsSync(join(dist, 'cli/main.js'))) throw new Error('the build made no dist/cli/main.js')
cpSync(join(root, 'package.json'), join(dist, 'package.json'))
console.log('built dist/')
