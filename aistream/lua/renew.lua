-- Renews the leases of all of a worker's running sessions at once, and is the judge of who has lost one.
-- KEYS  1 deadlines zset, 2.. session hashes
-- ARGV  1 worker, 2 lease in ms, 3.. for each session: id, epoch
-- gives for each session 1 (still its owner), 0 (another epoch or worker, or ended) or -1 (gone)
-- Atomic: between the look and the new deadline nobody may recover the session. Idempotent.
local lease_until = now_ms() + ARGV[2]
local verdicts = {}
for i = 2, #KEYS do
  local id, epoch = ARGV[2 * i - 1], ARGV[2 * i]
  local s = redis.call('HMGET', KEYS[i], 'state', 'epoch', 'worker')
  if not s[1] then
    verdicts[i - 1] = -1
  elseif s[1] == 'running' and s[2] == epoch and s[3] == ARGV[1] then
    redis.call('ZADD', KEYS[1], lease_until, id)
    verdicts[i - 1] = 1
  else
    verdicts[i - 1] = 0
  end
end
return verdicts
