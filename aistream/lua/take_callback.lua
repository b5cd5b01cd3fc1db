-- Takes a due callback for one attempt and hides it from others for a lease, which its worker renews while it attempts it.
-- KEYS  1 session hash, 2 content hash, 3 origins zset
-- ARGV  1 id, 2 lease in ms
-- gives nil | {attempt, attempts since somebody had it delivered again, '1' if an earlier attempt may have arrived, ms since n8n
--       began to say that the execution is running, ms since the session ended, session as a flat list, content as a flat list}
-- Atomic: two workers must not take one callback at the same time. An attempt that is found open belongs to a worker that
-- was lost in the middle of it: nobody knows whether it arrived.
local s = redis.call('HMGET', KEYS[1], 'callback', 'open', 'origin', 'attempt', 'history')
if s[1] ~= 'owed' then
  return nil
end
local now = now_ms()
local due = redis.call('ZSCORE', KEYS[3] .. ':' .. s[3], ARGV[1])
if due and tonumber(due) > now then
  return nil
end
if s[2] == '1' then
  local lost = string.format('{"attempt":%d,"outcome":"lost"}\n', s[4])
  redis.call('HSET', KEYS[1], 'ambiguous', '1', 'history', shortened((s[5] or '') .. lost))
end
redis.call('HSET', KEYS[1], 'open', '1')
local attempt = redis.call('HINCRBY', KEYS[1], 'attempt', 1)
owe(KEYS[3], s[3], ARGV[1], now + ARGV[2])
local t = redis.call('HMGET', KEYS[1], 'before', 'ambiguous', 'running_since', 'ended_at')
return { attempt, attempt - (t[1] or 0), t[2] or '0', t[3] and now - t[3] or 0, now - t[4],
  redis.call('HGETALL', KEYS[1]), redis.call('HGETALL', KEYS[2]) }
